// Calls of the server. No state but the key.

const KEY = "zincmetal.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

// What a server refused, or why it could not be reached. `status` 0: there was no answer.
export class ApiError extends Error {
  constructor(message, status = 0, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function call(path, options = {}) {
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}) };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!reply.ok) throw await refusal(reply);
  return reply;
}

async function refusal(reply) {
  let error = {};
  try {
    error = (await reply.json()).error ?? {};
  } catch {
    // a proxy's page, or nothing
  }
  const message = typeof error === "string" ? error : error.message;
  return new ApiError(message || `The server answered ${reply.status}.`, reply.status, error.code ?? "");
}

export const models = async () => (await (await call("/v1/models")).json()).data ?? [];

// The memory that a model needs, and whether it fits this machine. Nothing is loaded for it.
export const planOf = async (model) => (await call(`/v1/models/${encodeURIComponent(model)}/plan`)).json();

export const loadModel = async (model) =>
  (await call("/models/load", { method: "POST", body: JSON.stringify({ model }) })).json();

// Yields the chunks of a chat. Throws ApiError; also if the stream ends before it is complete.
export async function* chat(body, signal) {
  const reply = await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  let complete = false;
  for await (const data of events(reply.body)) {
    if (data === "[DONE]") {
      complete = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message ?? "The answer failed.", 0, chunk.error.code ?? "");
    yield chunk;
  }
  if (!complete) throw new ApiError("The connection was lost before the answer was complete.");
}

// Yields the data of server-sent events.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection was lost before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
