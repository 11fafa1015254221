"""Files: written whole, fetched once, shipped with the package."""
