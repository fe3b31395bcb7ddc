"""Quantised weights outside of the kernels: the formats on disk, the plain quantisers, calibration, receipts."""
