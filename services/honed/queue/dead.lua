-- Dead letters: back to work, or away.
--
-- What a letter became is remembered for a while under its id: the entry that it was replayed as, or DELETED.
local DELETED = '(deleted)'

-- @operation replay
-- Moves a dead letter back to its stage as a fresh entry, with its history. Again for the same letter: the same answer.
-- KEYS 1 dead letters, 2 stream, 3 tally, 4 replayed. ARGV 1 the letter, 2 seconds to remember it.
-- Returns the new entry's id, or false if there is no such letter.
local letter = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not letter then
  local became = redis.call('HGET', KEYS[4], ARGV[1])
  return became ~= DELETED and became
end
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

-- @operation delete
-- Removes dead letters for good. Again for the same letters: the same answer.
-- KEYS 1 dead letters, 2 tally, 3 replayed. ARGV 1 seconds to remember them, 2.. letters. Returns 1 or 0 for each.
local flags, deleted = {}, 0
for i = 2, #ARGV do
  local gone = redis.call('XDEL', KEYS[1], ARGV[i])
  if gone == 1 then
    deleted = deleted + 1
    redis.call('HSET', KEYS[3], ARGV[i], DELETED)
  elseif redis.call('HGET', KEYS[3], ARGV[i]) == DELETED then
    gone = 1
  end
  flags[#flags + 1] = gone
end
if deleted > 0 then
  redis.call('HINCRBY', KEYS[2], 'deleted', deleted)
  redis.call('EXPIRE', KEYS[3], ARGV[1])
end
return flags

-- @operation recent
-- KEYS 1 dead letters. ARGV 1 window in ms, 2 most to count. Returns how many are younger than the window. A letter's id
-- begins with the time at which it was written.
local now = redis.call('TIME')
local from = string.format('%.0f', tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000) - tonumber(ARGV[1]))
local count, most = 0, tonumber(ARGV[2])
while count < most do
  local page = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', math.min(64, most - count))
  if #page == 0 then break end
  count = count + #page
  from = '(' .. page[#page][1]
end
return count
