// What each option is answered with.
//
// 1. A selection of meta contexts ends with the next SET_META_CONTEXT, whatever becomes of that one.
// 2. Before TLS, where it is required, only STARTTLS and ABORT are looked at.

extension Handshake {
    mutating func answer(
        _ option: OptionCode, _ data: [UInt8], _ output: inout [UInt8],
        _ exports: inout some ExportDirectory
    ) -> Outcome? {
        switch option {
        case .abort:
            output.appendReply(to: .abort, .ack)
            return .close(.aborted)
        case .startTLS:
            return startTLS(data, &output)
        case _ where mustSecure:
            if option == .exportName { return .close(.violation("EXPORT_NAME before TLS")) }
            output.appendFailure(of: option, .tlsRequired)
            return .send
        case .exportName:
            return openByName(data, &output, &exports)
        case .list:
            guard data.isEmpty else { return refuseData(of: option, &output) }
            beginListing()
            return nil
        case .info, .go:
            return answerQuery(option, data, &output, &exports)
        case .structuredReply where best >= .structured:
            guard data.isEmpty else { return refuseData(of: option, &output) }
            if format == .extended {
                output.appendFailure(of: option, .extendedHeadersRequired)
            } else {
                format = .structured
                output.appendReply(to: option, .ack)
            }
        case .extendedHeaders where best == .extended:
            guard data.isEmpty else { return refuseData(of: option, &output) }
            format = .extended
            output.appendReply(to: option, .ack)
        case .listMetaContext, .setMetaContext:
            answerContexts(option, data, &output, &exports)
        default:
            output.appendFailure(of: option, Self.unsupported(option))
        }
        return .send
    }

    private var mustSecure: Bool { tls == .require && !isSecure }

    private func refuseData(of option: OptionCode, _ output: inout [UInt8]) -> Outcome {
        output.appendFailure(of: option, .invalid("option \(option.rawValue) has no data"))
        return .send
    }

    private func startTLS(_ data: [UInt8], _ output: inout [UInt8]) -> Outcome {
        if tls == .off {
            output.appendFailure(of: .startTLS, Self.unsupported(.startTLS))
        } else if isSecure {
            output.appendFailure(of: .startTLS, .invalid("TLS has been started already"))
        } else if !data.isEmpty {
            return refuseData(of: .startTLS, &output)
        } else {
            output.appendReply(to: .startTLS, .ack)
            return .startTLS
        }
        return .send
    }

    // MARK: - Exports

    /// EXPORT_NAME has no way to refuse but to hang up.
    private mutating func openByName(
        _ data: [UInt8], _ output: inout [UInt8], _ exports: inout some ExportDirectory
    ) -> Outcome {
        guard let name = validName(data) else {
            return .close(.violation("a name that is not UTF-8 without NUL"))
        }
        if format == .extended {
            return .close(.violation("EXPORT_NAME after EXTENDED_HEADERS"))
        }
        let isAbsent = Outcome.close(.violation("there is no export of the name asked for"))
        guard isPossible(name) else { return isAbsent }
        let contexts = selectedContexts(of: name)
        switch exports.open(name, contexts: contexts, secure: isSecure) {
        case .absent:
            return isAbsent
        case .requiresTLS:
            return .close(.violation("the export asked for requires TLS"))
        case .refused(let text):
            return .close(.violation("the export was refused: \(text)"))
        case .busy:
            return wait(.exportName, data)
        case .opened(let export):
            let agreement = Agreement(export: export, format: format, contexts: contexts)
            output.appendExport(of: agreement, noZeroes: noZeroes)
            return .transmit(agreement)
        }
    }

    private mutating func answerQuery(
        _ option: OptionCode, _ data: [UInt8], _ output: inout [UInt8],
        _ exports: inout some ExportDirectory
    ) -> Outcome {
        do throws(OptionFailure) {
            let query = try ExportQuery.parse(data)
            let contexts = selectedContexts(of: query.name)
            let found: Export?
            if option == .go {
                switch exports.open(query.name, contexts: contexts, secure: isSecure) {
                case .opened(let export): found = export
                case .absent: found = nil
                case .requiresTLS: throw .tlsRequired
                case .refused(let text): throw OptionFailure(type: .policy, text: text)
                case .busy: return wait(option, data)
                }
            } else {
                found = exports.describe(query.name)
                if let found, isHidden(found) { throw .tlsRequired }
            }
            guard let export = found else { throw .unknownExport(query.name) }
            let agreement = Agreement(export: export, format: format, contexts: contexts)
            output.appendInfo(of: agreement, to: option, asked: query.infoTypes)
            output.appendReply(to: option, .ack)
            return option == .go ? .transmit(agreement) : .send
        } catch {
            output.appendFailure(of: option, error)
            return .send
        }
    }

    /// It requires TLS, which this client has not asked for.
    private func isHidden(_ export: Export) -> Bool { export.requiresTLS && !isSecure }

    // MARK: - Meta contexts

    private func selectedContexts(of name: String) -> [MetaContext] {
        name == selection.exportName ? selection.contexts : []
    }

    private mutating func answerContexts(
        _ option: OptionCode, _ data: [UInt8], _ output: inout [UInt8],
        _ exports: inout some ExportDirectory
    ) {
        if option == .setMetaContext { selection = Selection() }
        do throws(OptionFailure) {
            if format == .simple { throw .invalid("STRUCTURED_REPLY has to come first") }
            let query = try ContextQuery.parse(data)
            guard let export = exports.describe(query.exportName) else {
                throw .unknownExport(query.exportName)
            }
            if isHidden(export) {
                // TLS_REQD would say that no option but STARTTLS is answered.
                throw OptionFailure(type: .policy, text: "the export is for clients with TLS")
            }
            if option == .setMetaContext {
                let contexts = try select(query, &exports)
                selection = Selection(exportName: query.exportName, contexts: contexts)
                for context in contexts { output.appendContext(context, to: option) }
            } else {
                for name in try list(query, &exports) {
                    output.appendContext(MetaContext(id: 0, name: name), to: option)
                }
            }
            output.appendReply(to: option, .ack)
        } catch {
            output.appendFailure(of: option, error)
        }
    }

    private func select(
        _ query: ContextQuery, _ exports: inout some ExportDirectory
    ) throws(OptionFailure) -> [MetaContext] {
        var contexts: [MetaContext] = []
        for name in query.queries
        where !contexts.contains(where: { $0.name == name })
            && exports.hasContext(name, of: query.exportName, secure: isSecure)
        {
            guard contexts.count < Limits.maximumContexts else {
                throw OptionFailure(
                    type: .tooBig,
                    text: "at most \(Limits.maximumContexts) contexts can be selected")
            }
            contexts.append(MetaContext(id: UInt32(contexts.count + 1), name: name))
        }
        return contexts
    }

    /// A query that ends in a colon asks for everything below it; no query at all for everything.
    private func list(
        _ query: ContextQuery, _ exports: inout some ExportDirectory
    ) throws(OptionFailure) -> [String] {
        if query.asksForAll {
            return exports.contextNames(
                of: query.exportName, beginningWith: "", secure: isSecure)
        }
        // So that the work has an end: a list is for people.
        guard query.queries.count <= Limits.maximumContexts else {
            throw OptionFailure(
                type: .tooBig, text: "at most \(Limits.maximumContexts) queries are answered")
        }
        var names: [String] = []
        var known: Set<String> = []
        for asked in query.queries {
            let found =
                asked.hasSuffix(":")
                ? exports.contextNames(
                    of: query.exportName, beginningWith: asked, secure: isSecure)
                : exports.hasContext(asked, of: query.exportName, secure: isSecure) ? [asked] : []
            names += found.filter { known.insert($0).inserted }
        }
        return names
    }

    // MARK: - What is not looked at

    mutating func refuseLong(_ option: OptionCode, _ output: inout [UInt8]) -> Outcome {
        if option == .setMetaContext { selection = Selection() }
        switch option {
        case .abort:
            output.appendReply(to: .abort, .ack)
            return .close(.aborted)
        case _ where mustSecure && option != .startTLS:
            output.appendFailure(of: option, .tlsRequired)
        case .startTLS where tls != .off, .list, .structuredReply, .extendedHeaders:
            return refuseData(of: option, &output)
        case .info, .go, .listMetaContext, .setMetaContext:
            output.appendFailure(
                of: option, OptionFailure(type: .tooBig, text: "the option is too long"))
        default:
            output.appendFailure(of: option, Self.unsupported(option))
        }
        return .send
    }

    private static func unsupported(_ option: OptionCode) -> OptionFailure {
        OptionFailure(type: .unsupported, text: "option \(option.rawValue) is not supported")
    }
}
