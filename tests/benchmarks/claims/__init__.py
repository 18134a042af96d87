"""`make bench-claims`: what paging and sharing give on the running system, against reservations.

One list of requests goes through the same engine, model and amount of KV memory several times: as
kvd serves it, and behind a front that lets a request in only when a contiguous run of slots for
its longest possible length is free, as systems did before paged attention.
"""
