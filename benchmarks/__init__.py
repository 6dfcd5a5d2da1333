"""What is measured against what: `python -m benchmarks.NAME --json`, one JSON object each."""
