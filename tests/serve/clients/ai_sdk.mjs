// Asks a server through the AI SDK, by every API that it speaks, and prints what it made of the answers as JSON.
//
//   node ai_sdk.mjs URL FOLDER_OF_NODE_MODULES
//
// Each request is one word, by which the server's script knows what to answer.

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

globalThis.AI_SDK_LOG_WARNINGS = false; // they would stand between the results
const [url, folder] = process.argv.slice(2);
const require = createRequire(pathToFileURL(`${folder}/package.json`));
const load = (name) => import(pathToFileURL(require.resolve(name)));
const { streamText, generateText, tool, Output, jsonSchema, stepCountIs } = await load("ai");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createAnthropic } = await load("@ai-sdk/anthropic");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");

const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "x" });
const anthropic = createAnthropic({ baseURL: `${url}/v1`, apiKey: "x" });
const compatible = createOpenAICompatible({ name: "local", baseURL: `${url}/v1`, includeUsage: true });
const models = {
  responses: openai.responses("scripted"),
  chat: openai.chat("scripted"),
  messages: anthropic("scripted"),
  compatible: compatible("scripted"),
};

const city = jsonSchema({
  type: "object",
  properties: { city: { type: "string" } },
  required: ["city"],
  additionalProperties: false,
});
const weather = tool({ description: "The weather", inputSchema: city });
const warm = tool({ description: "The weather", inputSchema: city, execute: async () => "22 degrees" });

/** What a stream said: the kinds of its parts in their order, and the whole. */
async function streamed(options) {
  const result = streamText({ maxRetries: 0, onError: () => {}, ...options });
  const kinds = [];
  const errors = [];
  for await (const part of result.fullStream) {
    if (kinds.at(-1) !== part.type) kinds.push(part.type);
    if (part.type === "error") errors.push(String(part.error?.message ?? part.error));
  }
  if (errors.length) return { kinds, errors };
  return { kinds, ...(await whole(result)) };
}

async function whole(result) {
  const usage = await result.totalUsage;
  const calls = (await result.toolCalls).map((call) => [call.toolName, call.input]);
  return {
    text: await result.text,
    reasoning: await result.reasoningText,
    calls,
    reason: await result.finishReason,
    usage: [usage.inputTokens, usage.outputTokens],
    steps: (await result.steps).length,
  };
}

const failure = (error) => ({ errors: [error.data?.error?.message ?? error.message], status: error.statusCode });

async function aborted(model) {
  const stop = new AbortController();
  const result = streamText({ model, prompt: "slow", abortSignal: stop.signal, maxRetries: 0, onError: () => {} });
  let kind = "";
  for await (const part of result.fullStream) {
    kind = part.type;
    if (kind === "text-delta") stop.abort();
  }
  return { last: kind };
}

const found = {};
for (const [name, model] of Object.entries(models)) {
  const tools = { weather };
  found[name] = {
    text: await streamed({ model, prompt: "text" }),
    plain: await generateText({ model, prompt: "text", maxRetries: 0 }).then(whole),
    // Of a response it shows summaries alone, and asks for them only if the model is said to reason.
    reasoning: await streamed({
      model,
      prompt: "reasoning",
      providerOptions: { openai: { reasoningSummary: "auto", forceReasoning: true } },
    }),
    tool: await streamed({ model, prompt: "tool", tools }),
    parallel: await streamed({ model, prompt: "parallel", tools, toolChoice: "required" }),
    loop: await streamed({ model, prompt: "loop", tools: { weather: warm }, stopWhen: stepCountIs(3) }),
    length: await streamed({ model, prompt: "length", maxOutputTokens: 4 }),
    schema: await generateText({ model, prompt: "schema", output: Output.object({ schema: city }), maxRetries: 0 }).then(
      async (result) => ({ output: result.output }),
    ),
    midway: await streamed({ model, prompt: "midway" }),
    long: await generateText({ model, prompt: "x".repeat(5000), maxRetries: 0 }).then(whole, failure),
    abort: await aborted(model),
  };
}
console.log(JSON.stringify(found, null, 1));
