-- What feeds a run: where the loop stands, and prompts that wait beside the prompt file.

-- @operation snapshot
-- All that the conductor looks at, at one instant. KEYS 1 progress, 2 cursor, 3 and 4 lists of waiting prompts, then for each
-- stage: stream, tally, dead letters. ARGV 1 group. Returns {progress or false, cursor's flat fields, entries of each list,
-- then for each stage {depth, pending, dead letters, the tally's flat fields}}.
local found = {
  redis.call('HGET', KEYS[1], 'progress'), redis.call('HGETALL', KEYS[2]), redis.call('XLEN', KEYS[3]), redis.call('XLEN', KEYS[4]),
}
for i = 5, #KEYS, 3 do
  local pending = redis.pcall('XPENDING', KEYS[i], ARGV[1])  -- an error when there is no group yet
  found[#found + 1] = {
    redis.call('XLEN', KEYS[i]), pending.err and 0 or pending[1], redis.call('XLEN', KEYS[i + 2]), redis.call('HGETALL', KEYS[i + 1]),
  }
end
return found

-- @operation submit
-- Adds prompts, all or nothing. KEYS 1 list, 2 answer to this submission. ARGV 1 most that may wait, 2 digest of the prompts
-- ('': no answer to keep), 3 seconds to keep the answer, 4.. bodies. Returns {'added' | 'full' | 'other', entries that wait};
-- 'other': the same key was used for other prompts.
if ARGV[2] ~= '' then
  local before = redis.call('HMGET', KEYS[2], 'digest', 'waiting')
  if before[1] then return {before[1] == ARGV[2] and 'added' or 'other', tonumber(before[2])} end
end
local waiting = redis.call('XLEN', KEYS[1])
if waiting + #ARGV - 3 > tonumber(ARGV[1]) then return {'full', waiting} end
for i = 4, #ARGV do redis.call('XADD', KEYS[1], '*', 'body', ARGV[i]) end
waiting = waiting + #ARGV - 3
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[2], 'digest', ARGV[2], 'waiting', waiting)
  redis.call('EXPIRE', KEYS[2], ARGV[3])
end
return {'added', waiting}
