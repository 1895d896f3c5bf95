// Conversations: trees of messages, kept in this browser alone.
//
// A conversation is {id, title, changed, system, tools, leaf, nodes}. A node is {id, parent, role, content, …}: an edit
// or another try is a sibling of the message it replaces. What is shown is the path from the root to the leaf.

const DATABASE = "zincmetal";
const STORE = "chats";
const FORMAT = "zincmetal-chats-1";
const ROLES = new Set(["user", "assistant", "tool"]);
const TITLE = 60; // characters

const identifier = () => crypto.randomUUID?.() ?? [...crypto.getRandomValues(new Uint8Array(16))].map(hex).join("");
const hex = (byte) => byte.toString(16).padStart(2, "0");

export const newChat = () => ({
  id: identifier(),
  title: "",
  changed: Date.now(),
  system: "",
  tools: "",
  leaf: null,
  nodes: {},
});

export function path(chat) {
  const nodes = [];
  for (let id = chat.leaf; id !== null && chat.nodes[id]; id = chat.nodes[id].parent) nodes.push(chat.nodes[id]);
  return nodes.reverse();
}

export const children = (chat, parent) => Object.values(chat.nodes).filter((node) => node.parent === parent);

// Adds a message below `parent` and shows it.
export function add(chat, parent, fields) {
  const node = { id: identifier(), parent, at: Date.now(), content: "", ...fields };
  chat.nodes[node.id] = node;
  chat.leaf = node.id;
  if (!chat.title && node.role === "user") chat.title = node.content.trim().slice(0, TITLE);
  return node;
}

// Shows the branch of a node: down to its newest end.
export function show(chat, node) {
  for (let below = [node]; below.length; below = children(chat, node.id)) {
    node = below.reduce((last, each) => (each.at > last.at ? each : last));
  }
  chat.leaf = node.id;
}

// ---- the database of the browser

let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function within(mode, work) {
  const store = (await database()).transaction(STORE, mode).objectStore(STORE);
  const request = work(store);
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export const all = async () => (await within("readonly", (store) => store.getAll())).sort((a, b) => b.changed - a.changed);
export const remove = (id) => within("readwrite", (store) => store.delete(id));

export function save(chat) {
  chat.changed = Date.now();
  return within("readwrite", (store) => store.put(structuredClone(chat)));
}

// ---- files

export const exported = (chats) => JSON.stringify({ format: FORMAT, chats }, null, 1);

// Returns the conversations of an exported text, with new identifiers. Throws Error for any other text.
export function imported(text) {
  const file = JSON.parse(text);
  if (file?.format !== FORMAT || !Array.isArray(file.chats)) throw new Error("This is no file of conversations.");
  return file.chats.map(checked);
}

function checked(given) {
  const chat = { ...newChat(), title: words(given.title).slice(0, TITLE), system: words(given.system), tools: words(given.tools) };
  const names = new Map();
  const nodes = Object.values(given.nodes ?? {}).filter((node) => ROLES.has(node?.role));
  for (const node of nodes) names.set(node.id, identifier());
  for (const node of nodes) {
    const id = names.get(node.id);
    chat.nodes[id] = {
      id,
      parent: names.get(node.parent) ?? null,
      at: Number(node.at) || 0,
      role: node.role,
      content: words(node.content),
      reasoning: words(node.reasoning),
      calls: Array.isArray(node.calls) ? node.calls.map(call) : undefined,
      callId: node.callId === undefined ? undefined : words(node.callId),
      model: words(node.model),
    };
  }
  chat.leaf = names.get(given.leaf) ?? null;
  if (loops(chat) || !path(chat).length) throw new Error("A conversation of this file is damaged.");
  return chat;
}

const words = (value) => (typeof value === "string" ? value : "");
const call = (given) => ({ id: words(given?.id), name: words(given?.name), arguments: words(given?.arguments) });

// A file may hold a node that is its own ancestor.
function loops(chat) {
  return Object.values(chat.nodes).some((node) => {
    const seen = new Set();
    for (let id = node.id; id !== null; id = chat.nodes[id].parent) {
      if (seen.has(id)) return true;
      seen.add(id);
    }
    return false;
  });
}
