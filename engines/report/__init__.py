"""The written proof of an export: report.json, report.html and samples.png."""
