"""The daemon that owns the KV pages of a device."""

__version__ = "0.1.0"
