"""The model over a corpus: one pass with taps on hook points, what decides its bits, and the statistics that it leaves."""
