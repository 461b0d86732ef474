"""Other libraries: each module here may be imported without its library being installed."""
