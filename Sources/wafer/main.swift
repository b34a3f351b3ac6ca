print("wafer")
