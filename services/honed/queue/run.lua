-- Who may act for a run, and how far its prompts have come.
--
-- The fence is a counter that rises each time the lease changes hands. A holder keeps its claim until somebody with a
-- higher fence comes: after an outage longer than the lease's life the lease has expired, but if nobody took over, the
-- fence still stands and the holder goes on. Should Redis lose its last second and with it the counter's last step, the
-- higher fence still wins.
--
-- KEYS  1 lease   2 fence   3.. the operation's own
-- ARGV  1 owner   2 fence of the caller (0: none)   3.. the operation's own
local lease, counter = KEYS[1], KEYS[2]
local owner, fence = ARGV[1], tonumber(ARGV[2])

local function current()
  return tonumber(redis.call('GET', counter) or '0')
end

local function holder()
  local found = redis.call('HMGET', lease, 'owner', 'fence')
  return found[1], tonumber(found[2] or '0')
end

local function take(with, ttl)
  redis.call('SET', counter, with)
  redis.call('HSET', lease, 'owner', owner, 'fence', with)
  redis.call('PEXPIRE', lease, ttl)
end

-- Whether the caller's claim stands.
local function stands()
  local who, with = holder()
  if fence < current() then return false end
  return not who or with < fence or (with == fence and who == owner)
end

-- @operation acquire
-- KEYS 3 term. ARGV 3 life in ms, 4 a fence that the new one must exceed, 5 the caller's term (0: none). Returns {fence, owner,
-- ms left, highest term}: the caller's if it got it. A term that is over gets nothing; a new one takes the lease from whoever
-- holds it, because holders are chosen elsewhere.
local term, highest = tonumber(ARGV[5]), tonumber(redis.call('GET', KEYS[3]) or '0')
local who, with = holder()
if term > 0 and term < highest then return {with, who or '', 0, highest} end
if term > highest then
  redis.call('SET', KEYS[3], term)
  highest = term
  if who ~= owner then who = false end
end
if who and who ~= owner then return {with, who, redis.call('PTTL', lease), highest} end
if not who or with <= tonumber(ARGV[4]) then with = math.max(current(), with, tonumber(ARGV[4])) + 1 end
take(with, ARGV[3])
return {with, owner, tonumber(ARGV[3]), highest}

-- @operation term
-- KEYS 3 term. Returns the highest term in which the lease was taken.
return tonumber(redis.call('GET', KEYS[3]) or '0')

-- @operation renew
-- ARGV 3 life in ms. Returns {1 or 0, current fence}.
if not stands() then return {0, math.max(current(), (select(2, holder())))} end
take(fence, ARGV[3])
return {1, fence}

-- @operation release
-- Ends the lease now, so that a successor need not wait. Returns 1 if it was the caller's.
local who, with = holder()
if who ~= owner or with ~= fence then return 0 end
redis.call('DEL', lease)
return 1

-- @operation check
-- Returns {1 or 0, current fence}.
return {stands() and 1 or 0, math.max(current(), (select(2, holder())))}

-- @operation admit
-- Adds prompts and moves the run's cursor, if the cursor is where the caller read it and the caller's claim stands.
-- KEYS 3 cursor, 4 prompts, 5 tally, 6 and 7 lists that prompts waited in. ARGV 3 position as read, 4 position to set, 5 the
-- cursor's other state, then for each list: how many entries are used up, their ids; then messages (id, body, traceparent).
-- Returns {'admitted' | 'moved' | 'fenced', position, current fence}. The cursor remembers who moved it from where, so a
-- repeat after a lost reply is told 'admitted' and adds nothing.
if not stands() then return {'fenced', 0, math.max(current(), (select(2, holder())))} end
local state = redis.call('HMGET', KEYS[3], 'position', 'from', 'fence')
local position = state[1] or '0'
local moves = ARGV[3] ~= ARGV[4]  -- a step that only takes prompts off a list may run again
if moves and state[1] == ARGV[4] and state[2] == ARGV[3] and state[3] == ARGV[2] then return {'admitted', position, fence} end
if position ~= ARGV[3] then return {'moved', position, fence} end
local i = 6
for list = 6, 7 do
  local last = i + tonumber(ARGV[i])
  for entry = i + 1, last do redis.call('XDEL', KEYS[list], ARGV[entry]) end
  i = last + 1
end
local added = (#ARGV - i + 1) / 3
for m = i, #ARGV, 3 do
  redis.call('XADD', KEYS[4], '*', 'id', ARGV[m], 'body', ARGV[m + 1], 'traceparent', ARGV[m + 2])
end
redis.call('HSET', KEYS[3], 'position', ARGV[4], 'from', ARGV[3], 'fence', ARGV[2], 'state', ARGV[5])
if added > 0 then redis.call('HINCRBY', KEYS[5], 'came_in', added) end
return {'admitted', ARGV[4], fence}
