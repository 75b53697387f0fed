-- Load for the native route: prompts of about 1,024 tokens, 128 new tokens each.
--
--     wrk -t1 -c1 -d5m -s ./wrk_script_1024.lua http://127.0.0.1:8000/generate/ --timeout 1m
--
-- -t and -c set how many requests run at the same time.

local n_predict = 128
local same_prompt = false -- true: the same prompt again and again, answered from the prefix cache

local folder = debug.getinfo(1, "S").source:match("^@(.*/)") or "./"
local wrk_load = dofile(folder .. "scripts/wrk_load.lua")

-- ignore_eos: every request makes all its tokens, so that runs can be compared.
wrk_load.install(folder, function(prompt)
    return string.format('{"prompt": %s, "n_predict": %d, "ignore_eos": true}',
        wrk_load.json_string(prompt), n_predict)
end, same_prompt)
