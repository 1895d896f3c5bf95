// Text of a model as HTML. The text is hostile: it is sanitised into nodes, and no HTML of it is ever parsed in place.

import { marked } from "/page/vendor/marked.esm.js";
import DOMPurify from "/page/vendor/purify.es.mjs";

const ALLOWED = {
  ALLOWED_TAGS: (
    "p br hr h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong del a table thead tbody tr th td sup sub " +
    "details summary kbd span"
  ).split(" "),
  ALLOWED_ATTR: ["href", "title", "class", "align", "start", "open"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|#)/i,
  RETURN_DOM_FRAGMENT: true,
};

// A picture would tell its server what was asked: its address is shown as a link in its place.
marked.use({
  gfm: true,
  renderer: {
    image({ href, text }) {
      const shown = escaped(`[picture: ${text || href}]`);
      return /^https?:/i.test(href) ? `<a href="${escaped(href)}">${shown}</a>` : shown;
    },
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("rel", "noopener noreferrer nofollow");
  node.setAttribute("target", "_blank");
  if (node.textContent !== node.getAttribute("href")) node.title = node.getAttribute("href") ?? "";
});

const escaped = (text) => text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);

// Shows a text that grows. Blocks that are complete are not rendered again.
export class Markdown {
  constructor(element) {
    this.element = element;
    this.blocks = []; // the source of each block that is shown
  }

  show(text) {
    const tokens = marked.lexer(text);
    const blocks = tokens.filter((token) => token.type !== "space");
    let same = 0;
    while (same < blocks.length && blocks[same].raw === this.blocks[same]) same++;
    while (this.element.children.length > same) this.element.lastChild.remove();
    for (const block of blocks.slice(same)) this.element.append(this.#rendered(block, tokens.links));
    this.blocks = blocks.map((block) => block.raw);
  }

  #rendered(block, links) {
    const div = document.createElement("div");
    const tokens = [block];
    tokens.links = links;
    div.append(DOMPurify.sanitize(marked.parser(tokens), ALLOWED));
    div.querySelectorAll("pre > code").forEach(finishCode);
    if (block.type !== "code" && /\$|\\[([]/.test(block.raw)) showMaths(div);
    return div;
  }
}

// ---- code: a button to copy it, and colours

let highlighter = null;

async function finishCode(code) {
  const language = [...code.classList].find((name) => name.startsWith("language-"))?.slice(9) ?? "";
  const bar = document.createElement("div");
  const copy = document.createElement("button");
  bar.className = "code-bar";
  copy.textContent = "Copy";
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code.textContent);
    copy.textContent = "Copied";
  });
  bar.append(language, copy);
  code.parentElement.prepend(bar);
  if (!language) return;
  highlighter ??= import("/page/vendor/highlight.min.js").then((module) => module.default);
  const hljs = await highlighter;
  if (!hljs.getLanguage(language)) return;
  const coloured = hljs.highlight(code.textContent, { language, ignoreIllegals: true }).value;
  code.replaceChildren(DOMPurify.sanitize(coloured, { ...ALLOWED, ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"] }));
}

// ---- maths: loaded when a text has some

const FORMULA = /\$\$([^$]+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$([^\s$](?:[^$\n]*?[^\s$\\])?)\$(?!\d)/gs;
let katex = null;

async function showMaths(element) {
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) {
    const node = walker.currentNode;
    FORMULA.lastIndex = 0;
    if (!node.parentElement.closest("code") && FORMULA.test(node.data)) texts.push(node);
  }
  if (!texts.length) return;
  katex ??= loadMaths();
  const renderer = await katex;
  for (const node of texts) node.replaceWith(...withFormulas(node.data, renderer));
}

function withFormulas(text, renderer) {
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(FORMULA)) {
    const [all, block, bracketed, inline, dollar] = found;
    const span = document.createElement("span");
    const source = block ?? bracketed ?? inline ?? dollar;
    renderer.render(source, span, {
      displayMode: Boolean(block ?? bracketed),
      throwOnError: false,
      trust: false,
      maxExpand: 200,
      maxSize: 20,
    });
    nodes.push(text.slice(at, found.index), span);
    at = found.index + all.length;
  }
  return [...nodes, text.slice(at)];
}

// A module, since a policy of trusted types lets no script be named by text.
async function loadMaths() {
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = "/page/vendor/katex.min.css";
  document.head.append(style);
  return (await import("/page/vendor/katex.mjs")).default;
}
