"""Search spaces of scripts.search."""
