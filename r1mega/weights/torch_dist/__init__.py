"""Megatron's distributed checkpoints, read and written without running a pickle."""
