"""Fused forwards, one file for each kind of block; each exports `FUSION`."""
