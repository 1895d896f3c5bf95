// Messages as elements. It knows no server and no database: what a person does goes to `actions`.

import { Markdown } from "/page/markdown.js";

export function element(tag, fields = {}, ...inside) {
  const made = Object.assign(document.createElement(tag), fields);
  made.append(...inside);
  return made;
}

const button = (text, title, action) => {
  const made = element("button", { type: "button", textContent: text, title });
  made.addEventListener("click", action);
  return made;
};

const ROLES = { user: "You", assistant: "Model", tool: "Result of a tool" };

// One message. `update` shows what has changed in its node since.
export class MessageView {
  constructor(node, around, actions) {
    this.node = node;
    this.actions = actions;
    this.reasoning = element("pre");
    this.thoughts = element("details", { className: "reasoning" }, element("summary", { textContent: "Reasoning" }), this.reasoning);
    this.text = element("div", { className: "text" });
    this.calls = element("div", { className: "calls" });
    this.note = element("p", { className: "note" });
    this.markdown = node.role === "assistant" ? new Markdown(this.text) : null;
    this.bar = element("div", { className: "bar" });
    this.element = element(
      "article",
      { className: `message ${node.role}` },
      element("h3", { textContent: node.model && node.role === "assistant" ? node.model : ROLES[node.role] }),
      this.thoughts, this.text, this.calls, this.note, this.bar,
    );
    this.element.dataset.id = node.id;
    this.around = around;
    this.update();
  }

  update() {
    const { node } = this;
    this.thoughts.hidden = !node.reasoning;
    if (node.reasoning) this.reasoning.textContent = node.reasoning;
    this.element.classList.toggle("running", Boolean(node.running));
    if (this.markdown) this.markdown.show(node.content);
    else this.text.textContent = node.content;
    this.#showCalls();
    this.note.textContent = noteOf(node);
    this.note.classList.toggle("trouble", Boolean(node.error));
    this.#showBar();
  }

  #showCalls() {
    const calls = this.node.calls ?? [];
    while (this.calls.children.length > calls.length) this.calls.lastChild.remove();
    calls.forEach((call, i) => {
      const shown = this.calls.children[i] ?? this.calls.appendChild(callView(call, this));
      shown.querySelector("code").textContent = call.arguments;
      shown.querySelector("summary").textContent = `calls ${call.name}`;
      shown.querySelector(".answer").hidden = !this.actions.waits(this.node, call);
    });
  }

  #showBar() {
    const { node, actions, around } = this;
    this.bar.replaceChildren();
    if (node.running) return;
    const at = around.findIndex((each) => each.id === node.id);
    if (around.length > 1) {
      const step = (to, text, title) => {
        const made = button(text, title, () => actions.show(around[to]));
        made.disabled = !around[to];
        return made;
      };
      const place = element("span", { textContent: `${at + 1}/${around.length}` });
      this.bar.append(step(at - 1, "‹", "Earlier version"), place, step(at + 1, "›", "Later version"));
    }
    this.bar.append(button("Copy", "Copy the text", () => navigator.clipboard.writeText(node.content)));
    if (node.role !== "tool") this.bar.append(button("Edit", "Edit in a new branch", () => this.edit()));
    if (node.role !== "assistant") return;
    this.bar.append(button("Again", "Answer again in a new branch", () => actions.again(node)));
    if (node.error || ["length", "stopped"].includes(node.finish))
      this.bar.append(button("Go on", "Continue this answer", () => actions.goOn(node)));
  }

  // Puts a field in place of the text; what is saved becomes a new branch.
  edit() {
    const area = element("textarea", { value: this.node.content, rows: 4 });
    area.setAttribute("aria-label", "New text");
    const save = button("Save", "Save as a new branch (Ctrl+Enter)", () => this.actions.edit(this.node, area.value));
    const leave = button("Leave", "Change nothing (Esc)", () => {
      form.remove();
      this.text.hidden = this.bar.hidden = false;
    });
    const form = element("div", { className: "editor" }, area, save, leave);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        leave.click();
      }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save.click();
    });
    this.text.hidden = this.bar.hidden = true;
    this.text.after(form);
    area.focus();
  }
}

// A tool call, and a field for its result: the page runs no tools.
function callView(call, view) {
  const answer = element("textarea", { rows: 2, placeholder: "Result of the call" });
  answer.setAttribute("aria-label", `Result of ${call.name}`);
  const send = button("Answer the call", "Send the result to the model", () => view.actions.result(view.node, call, answer.value));
  const details = element("details", { className: "call", open: true }, element("summary"), element("pre", {}, element("code")));
  return element("div", {}, details, element("div", { className: "answer" }, answer, send));
}

// The line below a message: what went wrong, or what it took.
function noteOf(node) {
  if (node.error) return node.error;
  const parts = [];
  if (node.finish === "length") parts.push("cut: no room for more tokens");
  if (node.finish === "stopped") parts.push("stopped");
  const { tokens, rate, first, cached, prompt } = node.figures ?? {};
  if (tokens) parts.push(`${tokens} tokens`);
  if (rate) parts.push(`${rate.toFixed(1)} tokens/s`);
  if (first !== undefined) parts.push(`first after ${first < 1000 ? `${Math.round(first)} ms` : `${(first / 1000).toFixed(1)} s`}`);
  if (cached) parts.push(`${cached.toLocaleString()} of ${prompt.toLocaleString()} tokens of the prompt from the cache`);
  return parts.join(" · ");
}
