"""KV events: what of a pool can be matched, told to routers as it changes (docs/events.md).

Off unless the pool's configuration has `[pool.events]`. kvd itself never relies on any of it.
"""
