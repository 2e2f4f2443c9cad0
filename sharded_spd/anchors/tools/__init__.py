"""What commands do with anchors: build, scan, interpolate."""
