"""Prediction: trained networks on disk, and segmentation of scans with them."""
