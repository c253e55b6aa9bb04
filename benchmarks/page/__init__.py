"""The tables and plots of docs/benchmarks.md, made from the results that are recorded; nothing is measured here."""
