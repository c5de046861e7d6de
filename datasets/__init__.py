"""Rows on disk become batches in memory. Imports nothing else of this package."""
