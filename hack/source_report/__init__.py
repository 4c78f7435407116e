"""Measures of the sources' sizes and language: `python -m hack.source_report`."""
