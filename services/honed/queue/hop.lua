-- The hop between two stages. Every operation below is atomic, and safe to repeat after a lost reply.
--
-- An entry is in exactly one place: waiting in its stream, pending with one consumer, gone on to the next stage, a dead
-- letter, or counted as acknowledged or dropped. Each operation moves it from one to another whole, so at any instant
--     came_in + replayed = XLEN + handed_on + acked + dead + all dropped:*        (fields of the stage's tally)
--
-- "Mine" means: pending, with this consumer, at this delivery count. A reclaim raises the count, so a slow worker whose
-- entry went to another (or back to itself) finds it is not its own and changes nothing.
--
-- Repeats. When a reply is lost the caller asks again, and finds the entry no longer pending: done by itself, or taken
-- away? Every call that changes who has what carries a token, and leaves its answer under that token in a hash of this
-- consumer, in the same step; a repeat is given that answer and changes nothing. The caller sends the tokens whose
-- answers it has seen with its next call, which erases them: so the hash is as large as the calls in flight, not as the
-- traffic. What a crashed process leaves expires.
--
-- KEYS  1 stream   2 tally   3 answers   4 failures   5.. the operation's own
-- ARGV  1 group    2 consumer   3 seconds that answers live   4 tokens seen, separated by spaces   5 token of this call
--       ('': a repeat needs no answer)   6.. the operation's own
local stream, tally, answers, failures = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local group, consumer, answers_live, token = ARGV[1], ARGV[2], ARGV[3], ARGV[5]
local RELEASED = '(released)'  -- owns entries that were given back; no process has this name

for seen in string.gmatch(ARGV[4], '%S+') do
  redis.call('HDEL', answers, seen)
end
if token ~= '' then
  local before = redis.call('HGET', answers, token)
  if before then return cmsgpack.unpack(before) end
end

local function answer(value)
  if token == '' then return value end
  redis.call('HSET', answers, token, cmsgpack.pack(value))
  redis.call('EXPIRE', answers, answers_live)
  return value
end

local function pending_row(entry)
  return redis.call('XPENDING', stream, group, entry, entry, 1)[1]
end

local function is_mine(entry, count)
  local row = pending_row(entry)
  return row ~= nil and row[2] == consumer and row[4] == tonumber(count)
end

local function remove(entry)
  redis.call('XACK', stream, group, entry)
  redis.call('XDEL', stream, entry)
  redis.call('HDEL', failures, entry)
end

local function count_as(field, n)
  if n > 0 then redis.call('HINCRBY', tally, field, n) end
end

-- The fields of an entry as a flat array, or nil if somebody deleted it from outside.
local function fields_of(entry)
  local found = redis.call('XRANGE', stream, entry, entry)[1]
  return found and found[2]
end

-- An entry that was deleted from outside is no work any more: stop tracking it, and say so in the books.
local function write_off(entry)
  remove(entry)
  count_as('dropped:deleted_outside', 1)
end

-- Moves an entry to the dead letters with why, when and how often it was tried.
local function bury(dead, stage, entry, fields, deliveries, holder, reason)
  local now = redis.call('TIME')
  local letter = {'XADD', dead, '*'}
  for _, part in ipairs(fields) do letter[#letter + 1] = part end
  local facts = {
    'reason', reason, 'deliveries', deliveries, 'consumer', holder, 'stage', stage, 'entry', entry,
    'at_ms', now[1] .. string.format('%03d', math.floor(tonumber(now[2]) / 1000)),
  }
  for _, part in ipairs(facts) do letter[#letter + 1] = part end
  redis.call(unpack(letter))
  remove(entry)
  count_as('dead', 1)
end

-- Row for the caller: entry, count, then the flat fields.
local function row_for(entry, count, fields)
  local row = {entry, count}
  for _, part in ipairs(fields) do row[#row + 1] = part end
  return row
end

-- @operation put
-- Adds new work. ARGV 6.. messages (id, body, traceparent).
for i = 6, #ARGV, 3 do
  redis.call('XADD', stream, '*', 'id', ARGV[i], 'body', ARGV[i + 1], 'traceparent', ARGV[i + 2])
end
count_as('came_in', (#ARGV - 5) / 3)
return answer(1)

-- @operation hand_on
-- Ends each delivery that is still mine, and adds its results to the next stage. Each delivery stands for itself.
-- KEYS 5 next stream, 6 next tally. ARGV 6.. per delivery: entry, count, number of results, results (id, body, traceparent).
-- Returns 1 (handed on) or 0 (not mine: nothing was added) for each delivery.
local flags, handed, added = {}, 0, 0
local i = 6
while i <= #ARGV do
  local entry, count, results = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  i = i + 3
  local mine = is_mine(entry, count)
  if mine then
    for r = i, i + 3 * (results - 1), 3 do
      redis.call('XADD', KEYS[5], '*', 'id', ARGV[r], 'body', ARGV[r + 1], 'traceparent', ARGV[r + 2])
    end
    remove(entry)
    handed, added = handed + 1, added + results
  end
  i = i + 3 * results
  flags[#flags + 1] = mine and 1 or 0
end
count_as('handed_on', handed)
if added > 0 then redis.call('HINCRBY', KEYS[6], 'came_in', added) end
return answer(flags)

-- @operation settle
-- Ends each delivery that is still mine, with no result. ARGV 6 field of the tally, 7.. entry, count.
-- Returns 1 or 0 for each delivery.
local flags, ended = {}, 0
for i = 7, #ARGV, 2 do
  local mine = is_mine(ARGV[i], ARGV[i + 1])
  if mine then
    remove(ARGV[i])
    ended = ended + 1
  end
  flags[#flags + 1] = mine and 1 or 0
end
count_as(ARGV[6], ended)
return answer(flags)

-- @operation renew
-- Starts the lease of each delivery that is still mine afresh; the count stays. ARGV 6.. entry, count.
-- Returns 1 or 0 for each delivery.
local flags = {}
for i = 6, #ARGV, 2 do
  local mine = is_mine(ARGV[i], ARGV[i + 1])
  if mine then redis.call('XCLAIM', stream, group, consumer, 0, ARGV[i], 'JUSTID') end
  flags[#flags + 1] = mine and 1 or 0
end
return flags

-- @operation release
-- Gives each delivery that is still mine back to be taken again after a pause, and takes this try off its count.
-- ARGV 6 idle time to set in ms (the lease less the pause), 7.. entry, count. Returns 1 or 0 for each delivery.
local flags = {}
for i = 7, #ARGV, 2 do
  local mine = is_mine(ARGV[i], ARGV[i + 1])
  if mine then
    redis.call('XCLAIM', stream, group, RELEASED, 0, ARGV[i], 'IDLE', ARGV[6], 'RETRYCOUNT', ARGV[i + 1] - 1, 'JUSTID')
  end
  flags[#flags + 1] = mine and 1 or 0
end
return answer(flags)

-- @operation fail
-- Ends one failed delivery: back to be taken again after a pause, or to the dead letters if its tries are used up.
-- KEYS 5 dead letters. ARGV 6 stage, 7 entry, 8 count, 9 reason, 10 most deliveries (0: bury now), 11 idle time to set
-- in ms (the lease less the pause). Returns 'retry', 'dead' or 'lost'.
local stage, entry, count, reason, most = ARGV[6], ARGV[7], ARGV[8], ARGV[9], tonumber(ARGV[10])
if not is_mine(entry, count) then return answer('lost') end
local fields = fields_of(entry)
if not fields then
  write_off(entry)
  return answer('lost')
end
if tonumber(count) >= most then
  bury(KEYS[5], stage, entry, fields, count, consumer, reason)
  return answer('dead')
end
redis.call('HSET', failures, entry, reason)
redis.call('XCLAIM', stream, group, RELEASED, 0, entry, 'IDLE', ARGV[11], 'JUSTID')
return answer('retry')

-- @operation reclaim
-- Takes over entries whose lease ran out; one that was delivered too often goes to the dead letters.
-- KEYS 5 dead letters. ARGV 6 stage, 7 lease in ms, 8 cursor, 9 most entries, 10 most deliveries.
-- Returns the cursor to go on from ('0-0': all seen), then the deliveries. A page can be empty with more to come.
local stage, lease, cursor, room, most = ARGV[6], ARGV[7], ARGV[8], tonumber(ARGV[9]), tonumber(ARGV[10])
local rows = {}
for _ = 1, 16 do  -- pages a call, so that a long list of pending entries never holds the server up
  local page = redis.call('XAUTOCLAIM', stream, group, consumer, lease, cursor, 'COUNT', room - #rows, 'JUSTID')
  cursor = page[1]
  -- JUSTID, because Redis 6.2 leaves deleted entries nameless otherwise. From 7 on it names those it forgot in page[3].
  for _, entry in ipairs(page[3] or {}) do write_off(entry) end
  for _, entry in ipairs(page[2]) do
    local fields = fields_of(entry)
    if not fields then
      write_off(entry)
    else
      redis.call('XCLAIM', stream, group, consumer, 0, entry)  -- raises the count
      local count = pending_row(entry)[4]
      if count > most then
        local why = redis.call('HGET', failures, entry)
        local reason = 'delivered ' .. most .. ' times and never finished'
        if why then reason = reason .. '; last failure: ' .. why end
        bury(KEYS[5], stage, entry, fields, count - 1, '', reason)
      else
        rows[#rows + 1] = row_for(entry, count, fields)
      end
    end
  end
  if cursor == '0-0' or #rows >= room then break end
end
return {cursor, rows}

-- @operation adopt
-- Takes what a consumer holds, in stream order, for this consumer: its own after a restart, or a predecessor's. The count
-- stays: a restart of the process is no failure of the entry. ARGV 6 the holder, 7 after this entry ('-': from the
-- start), 8 most entries to look at. Returns the last entry looked at ('': no more), then the deliveries.
local from = ARGV[7] == '-' and '-' or '(' .. ARGV[7]
local found = redis.call('XPENDING', stream, group, from, '+', ARGV[8], ARGV[6])
local rows = {}
for _, row in ipairs(found) do
  local fields = fields_of(row[1])
  if fields then
    redis.call('XCLAIM', stream, group, consumer, 0, row[1], 'JUSTID')
    rows[#rows + 1] = row_for(row[1], row[4], fields)
  else
    write_off(row[1])
  end
end
return answer({#found > 0 and found[#found][1] or '', rows})

-- @operation leave
-- Forgets this consumer, unless it holds something: deleting a consumer would lose what it holds.
if #redis.call('XPENDING', stream, group, '-', '+', 1, consumer) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer)
redis.call('DEL', answers)
return 1

-- @operation forget
-- Removes the names of consumers that hold nothing and have not come for ARGV 6 ms: their processes are gone. One that does
-- live is made anew by its next call. Returns how many.
local gone = 0
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', stream, group)) do
  local facts = {}
  for i = 1, #row, 2 do facts[row[i]] = row[i + 1] end
  if facts.pending == 0 and facts.idle > tonumber(ARGV[6]) and facts.name ~= consumer then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, facts.name)
    gone = gone + 1
  end
end
return gone

-- @operation stats
-- KEYS 5 dead letters. Returns the depth, the number pending, the number of dead letters, and the tally's flat fields.
return {
  redis.call('XLEN', stream), redis.call('XPENDING', stream, group)[1], redis.call('XLEN', KEYS[5]),
  redis.call('HGETALL', tally),
}
