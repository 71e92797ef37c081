"""Benchmarks of liteerresult: ``python -m benchmarks``. What each row means is in README.md here."""
