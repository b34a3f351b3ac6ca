// How many may connect, and who makes room for whom.

import NBDServer
import Testing

@Suite struct AdmissionTests {
    private func admitted(
        _ verdict: Admission.Verdict
    ) -> (session: Admission.Session, displaced: Admission.Session?)? {
        if case .admitted(let session, let displaced) = verdict { return (session, displaced) }
        return nil
    }

    private func owner(_ address: String) throws -> Peer.Owner {
        Peer(.internet(try #require(IPAddress(address))), description: "").owner
    }

    @Test func whoGreetsMakesRoom() throws {
        let admission = Admission(.init(total: 4))
        let mine = try #require(admitted(admission.admit(.user(1), reactor: 0)))
        let theirs = (0..<3).compactMap { _ in admitted(admission.admit(.user(2), reactor: 1)) }
        #expect(mine.displaced == nil && theirs.allSatisfy { $0.displaced == nil })
        // The oldest of whoever has the most, not the oldest of all, which is mine.
        let next = try #require(admitted(admission.admit(.user(3), reactor: 0)))
        #expect(next.displaced == theirs[0].session)
        #expect(admission.enter(theirs[0].session, export: "a") != nil)
        #expect(admission.enter(mine.session, export: "a") == nil)
        #expect(admission.enter(theirs[1].session, export: "a") == nil)
        #expect(admission.enter(theirs[2].session, export: "a") == nil)
        #expect(admission.enter(next.session, export: "a") == nil)
        // Nobody greets any more.
        #expect(admitted(admission.admit(.user(4), reactor: 0)) == nil)
        admission.forget(theirs[0].session)
        #expect(admitted(admission.admit(.user(4), reactor: 0)) == nil)
        admission.forget(theirs[1].session)
        admission.forget(theirs[1].session)
        #expect(admitted(admission.admit(.user(4), reactor: 0)) != nil)
        #expect(admitted(admission.admit(.user(5), reactor: 0))?.displaced?.owner == .user(4))
    }

    @Test func whoLeavesMakesRoom() throws {
        let admission = Admission(.init(total: 2, ofExport: 1))
        let greeting = try #require(admitted(admission.admit(.user(1), reactor: 0))).session
        let leaving = try #require(admitted(admission.admit(.user(1), reactor: 0))).session
        #expect(admission.enter(leaving, export: "a") == nil)
        #expect(admission.leave(leaving))
        // Before those who greet; and its place at the export is free.
        let next = try #require(admitted(admission.admit(.user(1), reactor: 0)))
        #expect(next.displaced == leaving)
        #expect(admission.enter(next.session, export: "a") == nil)
        #expect(!admission.leave(leaving))
        // Who has chosen nothing has nothing to give up.
        #expect(admission.leave(greeting))
        #expect(admitted(admission.admit(.user(1), reactor: 0))?.displaced == greeting)
    }

    @Test func ofOneClient() throws {
        let admission = Admission(.init(total: 100, ofClient: 2))
        for (mine, other) in [
            (Peer.Owner.user(1), Peer.Owner.user(2)),
            (try owner("192.0.2.1"), try owner("192.0.2.2")),
            (try owner("2001:db8::1"), try owner("2001:db8:0:1::1")),
            (try owner("fe80::1"), try owner("fe80::2")),
        ] {
            let first = try #require(admitted(admission.admit(mine, reactor: 0))).session
            #expect(admission.enter(first, export: "a") == nil)
            let second = try #require(admitted(admission.admit(mine, reactor: 0))).session
            let third = try #require(admitted(admission.admit(mine, reactor: 0)))
            #expect(third.displaced == second)
            #expect(admission.enter(third.session, export: "a") == nil)
            #expect(admitted(admission.admit(mine, reactor: 0)) == nil)
            #expect(admitted(admission.admit(other, reactor: 0))?.displaced == nil)
        }
        // One IPv6 host has many addresses.
        #expect(try owner("2001:db8::1") == owner("2001:db8::ffff:0:1"))
    }

    /// Who was let in by the server before stays, whatever the limits are and whoever comes.
    @Test func whoWasLetInStays() throws {
        let admission = Admission(.init(total: 2, ofClient: 2, ofExport: 2))
        let carried = (0..<3).compactMap { _ in
            admitted(admission.takeOver(.user(1), reactor: 0, export: "a"))?.session
        }
        #expect(carried.count == 3)
        #expect(admitted(admission.admit(.user(1), reactor: 0)) == nil)
        #expect(admitted(admission.admit(.user(2), reactor: 0)) == nil)
        for session in carried { #expect(admission.enter(session, export: "a") == nil) }
        for session in carried { admission.forget(session) }
        #expect(admission.isEmpty)
    }

    @Test func toOneExport() throws {
        let admission = Admission(.init(total: 100, ofExport: 1))
        let sessions = (0..<3).compactMap {
            admitted(admission.admit(.user($0), reactor: 0))?.session
        }
        #expect(admission.enter(sessions[0], export: "a") == nil)
        #expect(admission.enter(sessions[1], export: "a")?.contains("1 connections") == true)
        #expect(admission.enter(sessions[1], export: "b") == nil)
        admission.forget(sessions[0])
        #expect(admission.enter(sessions[2], export: "a") == nil)
    }

    /// Any order of events leaves what a plain list of the connections says.
    @Test func nothingIsLost() {
        var random = SplitMix(state: 5)
        func draw(_ count: Int) -> Int { Int(random.next() % UInt64(count)) }
        for _ in 0..<200 {
            let admission = Admission(.init(total: 12, ofClient: 5, ofExport: 6))
            var open: [(session: Admission.Session, export: String?)] = []
            for _ in 0..<150 {
                switch draw(5) {
                case 0, 1:
                    let owner = Peer.Owner.user(UInt32(draw(4)))
                    guard let (session, displaced) = admitted(admission.admit(owner, reactor: 0))
                    else {
                        let own = open.filter { $0.session.owner == owner }
                        let isFull = own.count == 5 && own.allSatisfy { $0.export != nil }
                        let isCrowded = open.count == 12 && open.allSatisfy { $0.export != nil }
                        #expect(isFull || isCrowded)
                        continue
                    }
                    if let displaced {
                        #expect(open.contains { $0.session == displaced && $0.export == nil })
                        open.removeAll { $0.session == displaced }
                    }
                    open.append((session, nil))
                    #expect(open.count <= 12)
                    #expect(open.count { $0.session.owner == owner } <= 5)
                case 2:
                    guard let index = open.firstIndex(where: { $0.export == nil }) else { continue }
                    let export = "export \(draw(2))"
                    let isIn = admission.enter(open[index].session, export: export) == nil
                    #expect(isIn == (open.count { $0.export == export } < 6))
                    if isIn { open[index].export = export }
                case 3:
                    guard !open.isEmpty else { continue }
                    let index = draw(open.count)
                    #expect(admission.leave(open[index].session))
                    open[index].export = nil
                default:
                    guard !open.isEmpty else { continue }
                    let session = open.remove(at: draw(open.count)).session
                    for _ in 0...draw(2) { admission.forget(session) }
                }
            }
            #expect(admission.isEmpty == open.isEmpty)
            for entry in open { admission.forget(entry.session) }
            #expect(admission.isEmpty)
        }
    }
}
