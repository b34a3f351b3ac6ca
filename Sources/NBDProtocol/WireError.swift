// From the system's errors to the few that the protocol has.

import Glibc

extension WireError {
    /// The error that tells a client what `errno` means for its request; 0 is success.
    ///
    /// What a device can say about itself becomes EIO, what the protocol has no word for EINVAL.
    /// Never ENOTSUP, which is for fast zeroing alone.
    public init(errno code: Int32) {
        self =
            switch code {
            case 0: .none
            case EPERM, EROFS, EACCES: .notPermitted
            case ENOMEM: .noMemory
            case ENOSPC, EDQUOT, EFBIG: .noSpace
            case EOVERFLOW: .overflow
            case ESHUTDOWN: .shutdown
            case EIO, ENXIO, ENODEV, ENOMEDIUM, EREMOTEIO, EBADMSG, EILSEQ, ETIMEDOUT, ECANCELED:
                .inputOutput
            default: .invalid
            }
    }
}
