// The volumes in the orders that clients ask for: by name, and by whom they share blocks with.

struct VolumeIndex {
    /// Sorted.
    let names: [String]
    /// Which of `families` each volume belongs to.
    private var familyOf: [String: Int] = [:]
    /// Volumes that descend from one another, over others that may be gone; each list sorted.
    private var families: [Int: [String]] = [:]

    init(_ entries: [Catalogue.Entry]) {
        let sorted = entries.sorted { $0.name < $1.name }
        names = sorted.map(\.name)
        var kin = Kinship(sorted.count)
        for (index, entry) in sorted.enumerated() {
            kin.join(index, .volume(entry.name))
            if let origin = entry.origin {
                kin.join(index, .volume(origin))
            } else if let family = entry.family {
                kin.join(index, .family(family))
            }
        }
        for (index, name) in names.enumerated() {
            let family = kin.head(of: index)
            families[family, default: []].append(name)
            familyOf[name] = family
        }
    }

    /// The first name that is greater; nil: none is.
    func name(after name: String?) -> String? {
        guard let name else { return names.first }
        var (low, high) = (0, names.count)
        while low < high {
            let middle = (low + high) / 2
            if names[middle] > name { high = middle } else { low = middle + 1 }
        }
        return low < names.count ? names[low] : nil
    }

    /// The others of its family: sorted, at most `limit`.
    func relatives(of name: String, limit: Int) -> [String] {
        guard let family = familyOf[name] else { return [] }
        return Array(families[family]!.lazy.filter { $0 != name }.prefix(max(0, limit)))
    }
}

/// Which of some numbered volumes are connected (disjoint sets).
private struct Kinship {
    /// What connects volumes: the same origin, which may be gone, or what the catalogue remembers.
    enum Bond: Hashable {
        case volume(String)
        case family(UInt64)
    }

    private var parents: [Int]
    private var members: [Bond: Int] = [:]

    init(_ count: Int) {
        parents = Array(0..<count)
    }

    mutating func join(_ index: Int, _ bond: Bond) {
        if let other = members[bond] {
            parents[head(of: index)] = head(of: other)
        } else {
            members[bond] = index
        }
    }

    /// The same for all that are connected.
    mutating func head(of index: Int) -> Int {
        var index = index
        while parents[index] != index {
            parents[index] = parents[parents[index]]
            index = parents[index]
        }
        return index
    }
}
