"""Redis Streams between the stages: one atomic hop, leases, dead letters, admission.

| module | what it holds |
|---|---|
| `keys` | the names of a run's keys, all with one hash tag |
| `connection` | the link to Redis: rides out an outage, up to a deadline |
| `messages` | what travels (`Message`) and what a consumer holds (`Delivery`) |
| `stream` | `WorkQueue`: take, hand on, acknowledge, drop, fail, renew |
| `stats` | a stage's books, which add up at any instant |
| `scripts` | runs the Lua files `hop.lua`, `dead.lua`, `run.lua`, `registry.lua` |
| `holding` | renews the leases of long work in the background |
| `dead` | list, show and replay dead letters |
| `lease` | the fenced lease of a learner or a conductor |
| `members` | which processes of a service are there, each under a lease |
| `progress` | how far the learner is |
| `admission` | how many prompts may start, and the atomic step that starts them |
| `embedded` | a redis-server of our own, for one machine |

Redis is transport, not the record. With `appendfsync everysec` a power cut, or a kill while the disk is slow, may lose the
last second or two of acknowledged writes. What is left is an earlier state that was consistent, streams, books, prompt
cursor and all, since every step is atomic: work is done again, none is skipped. That what is done again has no second
effect is the learner's part: its checkpoint says which rollouts have been trained on.
"""
