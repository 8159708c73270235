"""Elastic Weight Consolidation for PyTorch."""
