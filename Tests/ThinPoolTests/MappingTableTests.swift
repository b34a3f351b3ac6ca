// The mapping table next to a dictionary: pages that are packed, become plain, go and come again.

import Glibc
import Simulation
import Testing
import ThinMetadata

@testable import ThinPool

@Suite struct MappingTableTests {
    private static let pages: UInt64 = 4
    private static let pageEntries = UInt64(1) << MappingTable.longestPageShift
    private static let blocks = pages * pageEntries - 7

    @Test(arguments: [0, 1, 40, 246, 247, 512]) func everyEntryIsWhatWasPublished(
        mappedInAPage: Int
    ) throws {
        var random = SeededRandom(seed: UInt64(mappedInAPage + 1))
        let table = try #require(MappingTable(blocks: Self.blocks))
        var model: [UInt64: Mapping] = [:]
        var replaced: [UInt] = []
        func mapping() -> Mapping {
            Mapping(
                block: DataBlock(UInt64(random.below(1 << 20))), time: UInt32(random.below(9)))
        }
        for page in 0..<Self.pages {
            let range = table.pageRange(of: page * Self.pageEntries)
            for block in Array(range).shuffled(using: &random).prefix(mappedInAPage) {
                model[block] = mapping()
            }
        }
        for step in 0..<4000 {
            let block = UInt64(random.below(Int(Self.blocks)))
            if case .unknown = table.lookup(block) {
                table.load(pageOf: block) { set in
                    for block in table.pageRange(of: block) {
                        if let mapping = model[block] { set(VirtualBlock(block), mapping) }
                    }
                }
            }
            #expect(
                table.lookup(block) == (model[block].map { .mapped($0) } ?? .unmapped),
                "step \(step), block \(block)")
            // Mostly what is mapped anyway: then a packed page stays one.
            switch random.below(8) {
            case 0 where mappedInAPage > 0 && step > 2000: model[block] = mapping()
            case 1: model[block] = nil
            case 2, 3, 4: if model[block] != nil { model[block] = mapping() }
            case 5 where random.oneIn(20):
                table.evict(bytes: 1, keeping: block) { replaced.append($1) }
                #expect(table.lookup(block) != .unknown)
                continue
            default: break
            }
            if let old = table.publish(block, model[block]) { replaced.append(old) }
        }
        for block in 0..<Self.blocks {
            let entry = table.lookup(block)
            let expected: TableEntry = model[block].map { .mapped($0) } ?? .unmapped
            #expect(entry == .unknown || entry == expected)
        }
        table.removeAll { replaced.append($0) }
        #expect(table.bytes == 0)
        for address in replaced { free(UnsafeMutableRawPointer(bitPattern: address)) }
    }

    /// A table of the largest volume: to find what is in it takes no look at what is not.
    @Test func aLargeTableIsGoneThroughQuickly() throws {
        let blocks = UInt64(1) << 37
        let table = try #require(MappingTable(blocks: blocks))
        let present = [0, 5 << 20, (5 << 20) + Self.pageEntries, blocks / 2, blocks - 1]
        var addresses: [UInt] = []
        func load() {
            for block in present {
                table.load(pageOf: block) { $0(VirtualBlock(block), Mapping(rawValue: block)) }
            }
        }
        let elapsed = ContinuousClock().measure {
            for _ in 0..<3 {
                load()
                for _ in present { table.evict(bytes: 1, keeping: nil) { addresses.append($1) } }
                #expect(table.bytes == 0)
                load()
                table.removeAll { addresses.append($0) }
                #expect(table.bytes == 0)
                #expect(present.allSatisfy { table.lookup($0) == .unknown })
            }
        }
        #expect(addresses.count == 6 * present.count)
        #expect(elapsed < .seconds(1))
        for address in addresses { free(UnsafeMutableRawPointer(bitPattern: address)) }
    }

    /// What few mappings cost: a fraction of a plain page.
    @Test func aPageTakesMemoryForWhatIsMapped() throws {
        let table = try #require(MappingTable(blocks: Self.blocks))
        table.load(pageOf: Self.pageEntries) { _ in }
        let before = table.bytes
        table.load(pageOf: 0) { set in
            for block in stride(from: UInt64(0), to: Self.pageEntries, by: 16) {
                set(VirtualBlock(block), Mapping(block: DataBlock(block), time: 1))
            }
        }
        #expect(table.bytes - before < 400)
        table.removeAll { free(UnsafeMutableRawPointer(bitPattern: $0)) }
    }

    /// A client that reads a huge volume's holes here and there does not fill the memory.
    @Test func whatIsKnownOfHolesCountsAndIsForgotten() throws {
        let table = try #require(MappingTable(blocks: 1 << 37))
        let distance = 512 * Self.pageEntries
        let kept = 100 * distance
        for number in 0..<UInt64(1000) { table.load(pageOf: number * distance) { _ in } }
        #expect(table.bytes >= 1000 * 4096)
        var pages = 0
        table.evict(bytes: table.bytes, keeping: kept) { _, _ in pages += 1 }
        #expect(pages == 0 && table.bytes == 4096)
        #expect(table.lookup(kept) == .unmapped && table.lookup(kept + distance) == .unknown)
    }
}
