"""Prompts and documents: read, render, tokenize, order."""
