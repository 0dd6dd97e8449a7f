-- Who is there, how far the learner is, and whose run this is.
--
-- Members are fields of one hash, each with the time at which its lease runs out: whoever reads the list removes the expired
-- ones. Times are the server's own, so that no two hosts need the same clock.

local function now_ms()
  local now = redis.call('TIME')
  return tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
end

-- @operation register
-- KEYS 1 members. ARGV 1 name, 2 life in ms, 3 description (JSON).
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', now_ms() + tonumber(ARGV[2])) .. ' ' .. ARGV[3])
return 1

-- @operation leave
-- KEYS 1 members. ARGV 1 name. Returns 1 if it was there.
return redis.call('HDEL', KEYS[1], ARGV[1])

-- @operation members
-- KEYS 1 members. Returns the descriptions of those whose lease stands.
local now, found, all = now_ms(), {}, redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local ends, description = string.match(all[i + 1], '^(%d+) (.*)$')
  if ends and tonumber(ends) > now then
    found[#found + 1] = description
  else
    redis.call('HDEL', KEYS[1], all[i])
  end
end
return found

-- @operation report
-- KEYS 1 progress. ARGV 1 fence of the learner, 2 its progress (JSON). Returns 1, or 0 if a higher fence has reported.
local before = tonumber(redis.call('HGET', KEYS[1], 'fence') or '0')
if before > tonumber(ARGV[1]) then return 0 end
redis.call('HSET', KEYS[1], 'fence', ARGV[1], 'progress', ARGV[2])
return 1

-- @operation identify
-- KEYS 1 identity. ARGV 1 what the run is. Returns what it is in this Redis: the caller's answer if nobody said so before.
redis.call('SETNX', KEYS[1], ARGV[1])
return redis.call('GET', KEYS[1])
