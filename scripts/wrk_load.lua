-- What both wrk scripts share: a fresh prompt for every request, and an account of what came back.
-- Loaded by them with dofile; wrk runs one copy of it per thread.
--
-- wrk reserves 8 bytes for every microsecond of --timeout: 29 GB for 1h, of which it touches almost
-- nothing. Where it stops with "Out of memory trying to allocate", give --timeout 10m, or let the
-- kernel promise more than it has: sudo sysctl vm.overcommit_memory=1

local wrk_load = {}

local threads = {}

local function read_file(path)
    local file = io.open(path, "r")
    if not file then
        error("cannot read " .. path .. ": run wrk with the script where it lies, beside prompt/")
    end
    local text = file:read("*a")
    file:close()
    return (text:gsub("%s+$", ""))
end

function wrk_load.json_string(text)
    local escapes = { ['"'] = '\\"', ["\\"] = "\\\\", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t" }
    return '"' .. text:gsub('[%c"\\]', function(c)
        return escapes[c] or string.format("\\u%04x", c:byte())
    end) .. '"'
end

-- make_body(prompt) returns the JSON body. With `same_prompt` every request carries the same text,
-- and a server that keeps computed prompts answers all but the first without reading it.
function wrk_load.install(folder, make_body, same_prompt)
    local prompt = read_file(folder .. "prompt/1024.txt")
    local thread_number = 0
    local sent = 0
    answers, failures, first_failure, tokens = 0, 0, "", 0

    wrk.method = "POST"
    wrk.headers["Content-Type"] = "application/json"

    function setup(thread)
        thread:set("thread_id", #threads)
        table.insert(threads, thread)
    end

    function init()
        thread_number = thread_id or 0
        math.randomseed(os.time() + 7919 * thread_number)
        math.random()
        thread_number = thread_number .. "-" .. math.random(100000, 999999)
    end

    function request()
        local text = prompt
        if not same_prompt then
            sent = sent + 1
            text = "Text " .. thread_number .. "-" .. sent .. ". " .. prompt
        end
        return wrk.format(nil, nil, nil, make_body(text))
    end

    function response(status, headers, body)
        if status >= 200 and status < 300 then
            answers = answers + 1
            tokens = tokens + (tonumber(body:match('"completion_tokens"%s*:%s*(%d+)')) or 0)
        else
            failures = failures + 1
            if first_failure == "" then
                first_failure = status .. " " .. body:sub(1, 300):gsub("%s+", " ")
            end
        end
    end

    function done(summary, latency, requests)
        local answered, failed, generated, example = 0, 0, 0, ""
        for _, thread in ipairs(threads) do
            answered = answered + thread:get("answers")
            failed = failed + thread:get("failures")
            generated = generated + thread:get("tokens")
            if example == "" then example = thread:get("first_failure") end
        end
        local errors = summary.errors
        local seconds = summary.duration / 1e6
        print("------------------------------------------------------------")
        print(string.format("  Answered:         %d requests, %.3f per second", answered, answered / seconds))
        if generated > 0 then
            print(string.format("  Output tokens:    %d, %.1f per second", generated, generated / seconds))
        end
        print(string.format("  Latency:          mean %.0f ms, P50 %.0f ms, P90 %.0f ms, P99 %.0f ms",
            latency.mean / 1e3, latency:percentile(50) / 1e3, latency:percentile(90) / 1e3,
            latency:percentile(99) / 1e3))
        print(string.format("  Not 2xx:          %d", failed))
        if example ~= "" then print("  First of them:    " .. example) end
        print(string.format("  Transport errors: connect %d, read %d, write %d, timeout %d",
            errors.connect, errors.read, errors.write, errors.timeout))
        if answered == 0 then
            print("  NOT A CLEAN RUN: nothing was answered") -- wrk itself counts no open request
        elseif failed + errors.connect + errors.read + errors.write + errors.timeout > 0 then
            print("  NOT A CLEAN RUN: the figures above count answered requests only")
        end
    end
end

return wrk_load
