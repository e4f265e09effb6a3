"""The tests, which mirror the package file for file."""
