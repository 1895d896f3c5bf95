// The page: what is shown, and what a person does. Calls are in api.js, conversations in chats.js, elements in view.js.

import * as api from "/page/api.js";
import * as chats from "/page/chats.js";
import { element, MessageView } from "/page/view.js";
import { nextTheme, samplingFields, saveSettings, settings, showTheme } from "/page/settings.js";

const $ = (id) => document.getElementById(id);
const SOON = 50; // ms between two pictures of a growing answer
const NEAR_END = 80; // pixels: who has scrolled further up reads, and is left alone

let chat = chats.newChat();
let views = new Map(); // by the id of a node
let models = [];
let running = null; // {controller, node}

// ---- showing

function showChat() {
  views = new Map();
  const nodes = chats.path(chat);
  for (const node of nodes) {
    const around = chats.children(chat, node.parent).sort((a, b) => a.at - b.at);
    views.set(node.id, new MessageView(node, around, actions));
  }
  $("messages").replaceChildren(...[...views.values()].map((view) => view.element));
  if (!nodes.length) $("messages").append(element("p", { className: "empty", textContent: "Ask something." }));
  $("system").value = chat.system;
  $("tools").value = chat.tools;
  document.title = chat.title ? `${chat.title} – zincmetal` : "zincmetal";
  showContext(nodes.findLast((node) => node.figures)?.figures);
  scrollToEnd(true);
}

async function showHistory() {
  const wanted = $("search").value.trim().toLowerCase();
  const found = (await chats.all()).filter((each) => !wanted || JSON.stringify(each).toLowerCase().includes(wanted));
  $("chat-list").replaceChildren(
    ...found.map((each) => {
      const open = element("button", { className: "open", textContent: each.title || "Without a title" });
      const drop = element("button", { className: "drop", textContent: "×", title: "Delete" });
      drop.setAttribute("aria-label", `Delete ${each.title}`);
      if (each.id === chat.id) open.setAttribute("aria-current", "true");
      open.addEventListener("click", () => openChat(each));
      drop.addEventListener("click", () => dropChat(each));
      return element("div", { className: "entry" }, open, drop);
    }),
  );
}

function showContext(figures) {
  const window_ = chosen()?.max_model_len ?? 0;
  const used = (figures?.prompt ?? 0) + (figures?.tokens ?? 0); // none are known of an answer that was cut
  $("context").max = window_ || 1;
  $("context").value = used;
  $("context-figure").textContent = window_ ? `${used.toLocaleString()} of ${window_.toLocaleString()}` : "";
  $("cache-figure").textContent = figures?.cached ? `${figures.cached.toLocaleString()} tokens from the cache` : "";
}

function showTrouble(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

function showRunning() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  if (!running) $("progress").textContent = "";
}

function scrollToEnd(always) {
  const list = $("messages");
  if (always || list.scrollHeight - list.scrollTop - list.clientHeight < NEAR_END) list.scrollTop = list.scrollHeight;
}

// ---- models

const chosen = () => models.find((model) => model.id === $("model").value);

async function readModels() {
  try {
    models = await api.models();
    showTrouble("");
  } catch (error) {
    showTrouble(error.status === 401 ? "This server wants a key: write it into the settings." : error.message);
    if (error.status === 401) toggle("settings", true);
    return;
  }
  const before = $("model").value || settings.model;
  $("model").replaceChildren(
    ...models.map((model) => element("option", { value: model.id, textContent: nameOf(model) })),
  );
  if (models.some((model) => model.id === before)) $("model").value = before;
  showModel();
}

function nameOf(model) {
  const state = model.status?.value ?? "loaded";
  return state === "loaded" ? (model.display_name ?? model.id) : `${model.display_name ?? model.id} (${state})`;
}

function showModel() {
  const model = chosen();
  const state = model?.status?.value ?? "";
  $("model-state").textContent = state === "loaded" ? "" : state;
  $("load-model").hidden = state !== "unloaded" && state !== "failed";
  if (state === "unloaded") showFit(model);
  showContext(chats.path(chat).findLast((node) => node.figures)?.figures);
}

// Says whether a model that is not loaded fits this machine. Servers without plans say nothing.
async function showFit(model) {
  let plan;
  try {
    plan = await api.planOf(model.id);
  } catch {
    return;
  }
  if (chosen()?.id !== model.id || chosen()?.status?.value !== "unloaded") return;
  const gigabytes = (plan.bytes / 1e9).toFixed(1);
  const verdict = plan.fits ? "fits" : "does not fit";
  $("model-state").textContent = `${verdict}: ${gigabytes} GB with a context of ${plan.n_ctx.toLocaleString()}`;
}

async function loadModel() {
  $("model-state").textContent = "loading";
  $("load-model").hidden = true;
  try {
    await api.loadModel($("model").value);
  } catch (error) {
    showTrouble(error.message);
  }
  await readModels();
}

// ---- asking

function messagesOf(nodes) {
  const messages = chat.system ? [{ role: "system", content: chat.system }] : [];
  for (const node of nodes) {
    const message = { role: node.role, content: node.content };
    if (node.reasoning) message.reasoning_content = node.reasoning;
    if (node.calls?.length)
      message.tool_calls = node.calls.map(({ id, name, arguments: text }) => ({
        id, type: "function", function: { name, arguments: text },
      }));
    if (node.role === "tool") message.tool_call_id = node.callId;
    messages.push(message);
  }
  return messages;
}

function bodyOf(nodes) {
  const body = {
    model: $("model").value || undefined,
    messages: messagesOf(nodes),
    stream: true,
    stream_options: { include_usage: true },
    return_progress: true,
    ...settings.sampling,
  };
  if (settings.effort) body.reasoning_effort = settings.effort;
  const tools = toolsOf(chat.tools);
  if (tools.length) body.tools = tools;
  return body;
}

function toolsOf(text) {
  if (!text.trim()) return [];
  const tools = JSON.parse(text);
  if (!Array.isArray(tools)) throw new Error("the tools are no list");
  return tools.map((tool) => (tool.function ? tool : { type: "function", function: tool }));
}

// Lets the model answer below `parent`, or go on with the answer `continued`.
async function answer(parent, continued = null) {
  if (running) return;
  const node = continued ?? chats.add(chat, parent, { role: "assistant", model: $("model").value, reasoning: "", calls: [] });
  const nodes = chats.path(chat).filter((each) => continued || each.id !== node.id);
  Object.assign(node, { running: true, error: "", finish: "" });
  running = { controller: new AbortController(), node };
  showTrouble("");
  showChat();
  showRunning();
  try {
    const body = bodyOf(nodes);
    if (continued) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
    await take(node, body);
  } catch (error) {
    if (error.name === "AbortError") node.finish = "stopped";
    else node.error = error.message;
  } finally {
    delete node.running;
    running = null;
    showRunning();
    showChat();
    $("announce").textContent = node.error || "The answer is complete.";
    await chats.save(chat);
    await showHistory();
    await readModels();
  }
}

async function take(node, body) {
  const began = performance.now();
  const view = views.get(node.id);
  let due = 0;
  for await (const chunk of api.chat(body, running.controller.signal)) {
    if (chunk.prompt_progress) showProgress(chunk.prompt_progress);
    if (chunk.timings || chunk.usage) node.figures = figuresOf(node.figures, chunk);
    for (const { delta = {}, finish_reason: finish } of chunk.choices ?? []) {
      const grew = addDelta(node, delta);
      if (grew) {
        $("progress").textContent = "";
        node.figures ??= { first: performance.now() - began };
      }
      if (finish) node.finish = finish;
    }
    if (performance.now() < due) continue;
    due = performance.now() + SOON;
    view.update();
    scrollToEnd(false);
  }
}

function addDelta(node, delta) {
  node.content += delta.content ?? "";
  node.reasoning = (node.reasoning ?? "") + (delta.reasoning_content ?? "");
  for (const part of delta.tool_calls ?? []) {
    const call = (node.calls[part.index] ??= { id: "", name: "", arguments: "" });
    call.id ||= part.id ?? "";
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  return Boolean(delta.content || delta.reasoning_content || delta.tool_calls);
}

function figuresOf(before, { usage, timings }) {
  const figures = { ...before };
  if (usage) {
    figures.prompt = usage.prompt_tokens;
    figures.tokens = usage.completion_tokens;
    figures.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  }
  if (timings?.predicted_per_second) figures.rate = timings.predicted_per_second;
  return figures;
}

function showProgress({ total, cache, processed }) {
  const saved = cache ? `, ${cache.toLocaleString()} of them from the cache` : "";
  $("progress").textContent =
    processed < total ? `reads ${processed.toLocaleString()} of ${total.toLocaleString()} tokens${saved}` : "";
}

// ---- what a person does

const actions = {
  show(node) {
    chats.show(chat, node);
    showChat();
    chats.save(chat);
  },
  async edit(node, text) {
    if (running) return;
    const { role, model, reasoning, calls, callId } = node;
    const changed = chats.add(chat, node.parent, { role, model, reasoning, calls, callId, content: text });
    if (role === "user") return answer(changed.id);
    showChat();
    await chats.save(chat);
  },
  again: (node) => answer(node.parent),
  goOn(node) {
    chat.leaf = node.id;
    return answer(node.parent, node);
  },
  waits(node, call) {
    if (running || node.finish !== "tool_calls") return false;
    return !chats.path(chat).some((each) => each.callId === call.id);
  },
  async result(node, call, text) {
    chats.add(chat, chat.leaf, { role: "tool", content: text, callId: call.id });
    if (node.calls.every((each) => !actions.waits(node, each))) return answer(chat.leaf);
    showChat();
    await chats.save(chat);
  },
};

async function send(event) {
  event.preventDefault();
  const text = $("input").value;
  if (running || !text.trim()) return;
  $("input").value = "";
  fitInput();
  const asked = chats.add(chat, chat.leaf, { role: "user", content: text });
  await answer(asked.id);
}

function startChat() {
  running?.controller.abort();
  chat = chats.newChat();
  showChat();
  showHistory();
  $("input").focus();
}

function openChat(other) {
  running?.controller.abort();
  chat = other;
  showChat();
  showHistory();
  if (matchMedia("(max-width: 50rem)").matches) toggle("history", false);
}

async function dropChat(other) {
  if (!confirm(`Delete “${other.title}”?`)) return;
  await chats.remove(other.id);
  if (other.id === chat.id) startChat();
  else showHistory();
}

async function exportChats() {
  const blob = new Blob([chats.exported(await chats.all())], { type: "application/json" });
  const link = element("a", { href: URL.createObjectURL(blob), download: "zincmetal-conversations.json" });
  link.click();
  URL.revokeObjectURL(link.href);
}

async function importChats(event) {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  try {
    for (const each of chats.imported(await file.text())) await chats.save(each);
    showTrouble("");
  } catch (error) {
    showTrouble(`Nothing was imported: ${error.message}`);
  }
  showHistory();
}

function toggle(panel, open = $(panel).hidden) {
  $(panel).hidden = !open;
  $(`toggle-${panel}`).setAttribute("aria-expanded", String(open));
}

function fitInput() {
  const input = $("input");
  input.rows = Math.min(12, input.value.split("\n").length);
}

function takeTools() {
  const trouble = $("tools-trouble");
  try {
    toolsOf($("tools").value);
    chat.tools = $("tools").value;
    trouble.hidden = true;
  } catch (error) {
    trouble.textContent = `Not used: ${error.message}`;
    trouble.hidden = false;
  }
}

function keys(event) {
  if (event.key === "Escape" && running) running.controller.abort();
  if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    startChat();
  }
  if (event.key === "/" && document.activeElement === document.body) {
    event.preventDefault();
    $("input").focus();
  }
}

function listen() {
  $("composer").addEventListener("submit", send);
  $("input").addEventListener("input", fitInput);
  $("input").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  $("stop").addEventListener("click", () => running?.controller.abort());
  $("new-chat").addEventListener("click", startChat);
  $("search").addEventListener("input", showHistory);
  $("export").addEventListener("click", exportChats);
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", importChats);
  $("toggle-history").addEventListener("click", () => toggle("history"));
  $("toggle-settings").addEventListener("click", () => toggle("settings"));
  $("toggle-theme").addEventListener("click", nextTheme);
  $("load-model").addEventListener("click", loadModel);
  $("model").addEventListener("change", () => {
    settings.model = $("model").value;
    saveSettings();
    showModel();
  });
  $("system").addEventListener("input", () => (chat.system = $("system").value));
  $("tools").addEventListener("change", takeTools);
  $("effort").addEventListener("change", () => {
    settings.effort = $("effort").value;
    saveSettings();
  });
  $("key").addEventListener("change", () => {
    api.key.set($("key").value.trim());
    readModels();
  });
  document.addEventListener("keydown", keys);
}

showTheme();
samplingFields($("sampling"));
$("effort").value = settings.effort;
$("key").value = api.key.get();
if (matchMedia("(max-width: 50rem)").matches) toggle("history", false);
listen();
showRunning();
showChat();
await readModels();
await showHistory();
document.body.dataset.ready = "true";
