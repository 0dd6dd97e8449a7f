-- What the replicas of the reward service tell each other. The record of truth is a file in the store; this only says that it
-- has changed, and which versions are to be loaded beside the one that serves.

-- @operation announce
-- KEYS 1 promotions. ARGV 1 number of the promotion, 2 versions by scorer (JSON). An older number changes nothing.
-- Returns the number that stands.
local before = tonumber(redis.call('HGET', KEYS[1], 'number') or '0')
if before >= tonumber(ARGV[1]) then return before end
redis.call('HSET', KEYS[1], 'number', ARGV[1], 'promoted', ARGV[2])
return tonumber(ARGV[1])

-- @operation offer
-- KEYS 1 promotions. ARGV 1 scorer, 2 version, 3 source, 4 how many candidates of a scorer are kept. Adds a candidate as the
-- newest of its scorer; the oldest ones of that scorer go. Returns how many candidates there are.
local all = cjson.decode(redis.call('HGET', KEYS[1], 'candidates') or '[]')
local own, kept = 0, {{name = ARGV[1], version = ARGV[2], source = ARGV[3]}}
for _, candidate in ipairs(all) do
  if candidate.name ~= ARGV[1] then
    kept[#kept + 1] = candidate
  elseif candidate.version ~= ARGV[2] and own + 1 < tonumber(ARGV[4]) then
    own = own + 1
    kept[#kept + 1] = candidate
  end
end
redis.call('HSET', KEYS[1], 'candidates', cjson.encode(kept))
return #kept
