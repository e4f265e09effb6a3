"""Makes the documentation's reference from the package: `make docs`."""
