// The catalogue's own way of writing JSON.

import FoundationEssentials
import Testing

@testable import ThinPool

@Suite struct CatalogueTests {
    private static func catalogue() -> Catalogue {
        var catalogue = Catalogue()
        catalogue.deleting = [7, 16_777_214]
        catalogue.volumes = [
            .init(id: 1, name: "a._-+@:Z9", size: 512, created: 0),
            .init(id: 2, name: "b", size: 1 << 53, origin: "a._-+@:Z9", created: UInt64.max),
            .init(id: 3, name: "c", size: 1024, origin: "say \"ä\\\u{1}\n\"", created: 1),
        ]
        return catalogue
    }

    @Test(arguments: [Catalogue(), catalogue()]) func itsJSONIsWhatTheEncoderWrites(
        catalogue: Catalogue
    ) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys]
        #expect(try catalogue.json() == [UInt8](try encoder.encode(catalogue)))
        let decoded = try JSONDecoder().decode(Catalogue.self, from: Data(try catalogue.json()))
        #expect(decoded == catalogue)
    }
}
