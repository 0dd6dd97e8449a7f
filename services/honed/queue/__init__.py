"""Redis Streams between the stages: one atomic hop, leases, dead letters, admission.

| module | what it holds |
|---|---|
| `keys` | the names of a run's keys, all with one hash tag |
| `connection` | the link to Redis: rides out an outage, up to a deadline or for ever |
| `messages` | what travels (`Message`) and what a consumer holds (`Delivery`) |
| `stream` | `WorkQueue`: take, hand on, acknowledge, drop, release, fail, renew |
| `stats` | a stage's counts, which add up at any instant |
| `scripts` | runs the Lua files `hop.lua`, `dead.lua`, `run.lua`, `registry.lua`, `feed.lua` |
| `holding` | renews the leases of long work in the background |
| `dead` | list, show, replay and delete dead letters |
| `lease` | the fenced lease of a learner or a conductor |
| `identity` | whose run this is |
| `members` | which processes of a service are there, each under a lease |
| `progress` | how far the learner is |
| `admission` | how many prompts may start, and the atomic step that starts them |
| `snapshot` | where the whole loop stands, read at one instant |
| `inbox` | prompts that wait beside the prompt file |
| `application` | takes a share of what applications ask as prompts |
| `embedded` | a redis-server of our own, for one machine |

Redis is transport, not the record. With `appendfsync everysec` a power cut, or a kill while the disk is slow, may lose the
last second or two of acknowledged writes, and a failover to a replica may too. What is left is an earlier state that was
consistent, since every step is atomic: entries that had ended come again, entries that were new are gone. Redis cannot
know of either, so others see to it that this costs time only:

- That what comes again has no second effect is the learner's part: it knows each rollout's id, in hand or trained on, and drops
  the second copy as a duplicate.
- That no id names two prompts is the conductor's part: it goes on behind the highest turn that it admitted itself or
  that the learner reports.
- What is gone for good is counted (`honed.conductor.accounts`).
"""
