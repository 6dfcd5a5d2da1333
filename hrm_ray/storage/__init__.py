"""Folders that may lie anywhere: their files, whole or not there at all, and who holds them."""
