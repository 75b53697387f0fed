-- Load for the OpenAI completions route: prompts of about 1,024 tokens, 128 new tokens each.
--
--     wrk -t4 -c4 -d3m -s payload-1024.lua http://localhost:8000/v1/completions --timeout 1h
--     wrk -t12 -c12 -d15m -s payload-1024.lua http://localhost:8000/v1/completions --timeout 1h
--
-- -t and -c set how many requests run at the same time; the first line warms the server up.
-- "Out of memory trying to allocate": see scripts/wrk_load.lua about --timeout.

local model = "demo_model" -- must be a name that the server lists in /v1/models
local max_tokens = 128
local same_prompt = false -- true: the same prompt again and again, answered from the prefix cache

local folder = debug.getinfo(1, "S").source:match("^@(.*/)") or "./"
local wrk_load = dofile(folder .. "scripts/wrk_load.lua")

-- ignore_eos: every request makes all its tokens, so that runs can be compared.
wrk_load.install(folder, function(prompt)
    return string.format('{"model": %s, "prompt": %s, "n": 1, "best_of": 1, "use_beam_search": false, '
        .. '"temperature": 0.0, "top_p": 1.0, "max_tokens": %d, "ignore_eos": true, "stream": false}',
        wrk_load.json_string(model), wrk_load.json_string(prompt), max_tokens)
end, same_prompt)
