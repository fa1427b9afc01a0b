"""What Forebay is tested with: virtual time, scripted engines, faults and the conformance suite."""
