// Who may connect: `wafer serve`'s rules.

import ArgumentParser
import NBDServer
import Synchronization

struct AccessOptions: ParsableArguments {
    @Option(
        parsing: .singleValue,
        help: ArgumentHelp(
            "Let these clients connect: any, unix, tcp, uid:USER, gid:GROUP, ADDRESS[/PREFIX].",
            valueName: "rule"),
        transform: { try PlacedRule(.allow, $0) })
    var allow: [PlacedRule] = []
    @Option(
        parsing: .singleValue,
        help: ArgumentHelp("Let these clients connect, to read only.", valueName: "rule"),
        transform: { try PlacedRule(.allowReadOnly, $0) })
    var allowReadOnly: [PlacedRule] = []
    @Option(
        parsing: .singleValue,
        help: ArgumentHelp("Do not let these clients connect.", valueName: "rule"),
        transform: { try PlacedRule(.deny, $0) })
    var deny: [PlacedRule] = []

    /// In the order in which they were given.
    var rules: [AccessRule] {
        (allow + allowReadOnly + deny).sorted { $0.place < $1.place }.map(\.rule)
    }
}

/// A rule, and its place among those of all options: the order between different options is not
/// kept by the parser, but it reads them one after the other.
struct PlacedRule {
    let place: Int
    let rule: AccessRule

    private static let next = Atomic<Int>(0)

    init(_ decision: AccessRule.Decision, _ text: String) throws {
        do throws(AccessRuleError) { rule = try AccessRule(decision, text) } catch {
            throw ValidationError(error.description)
        }
        place = Self.next.wrappingAdd(1, ordering: .relaxed).newValue
    }
}
