// Which wafer this is.

public let waferVersion = "0.1.0"
