-- Dead letters go back to work.

-- @operation replay
-- Moves a dead letter back to its stage as a fresh entry, with its history. Again for the same letter: the same answer.
-- KEYS 1 dead letters, 2 stream, 3 tally, 4 replayed. ARGV 1 the letter, 2 seconds to remember it.
-- Returns the new entry's id, or false if there is no such letter.
local letter = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not letter then return redis.call('HGET', KEYS[4], ARGV[1]) end
local fields = {}
for i = 1, #letter[2], 2 do fields[letter[2][i]] = letter[2][i + 1] end
local history = fields.history and cjson.decode(fields.history) or {}
history[#history + 1] = {reason = fields.reason, deliveries = fields.deliveries, consumer = fields.consumer, at_ms = fields.at_ms}
local entry = redis.call('XADD', KEYS[2], '*', 'id', fields.id, 'body', fields.body, 'traceparent', fields.traceparent,
  'history', cjson.encode(history))
redis.call('XDEL', KEYS[1], ARGV[1])
redis.call('HINCRBY', KEYS[3], 'replayed', 1)
redis.call('HSET', KEYS[4], ARGV[1], entry)
redis.call('EXPIRE', KEYS[4], ARGV[2])
return entry
