"""The Accelerate script and its parts: entry points here, what they are made of in four packages."""
