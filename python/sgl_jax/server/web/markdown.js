// Markdown as elements. Answers are not trusted: HTML in them is shown as text and images become links, so that reading an
// answer asks no other site for anything. DOMPurify then keeps only the elements that markdown makes.
import { Marked } from "./vendor/marked.js";

const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt()};`);

const marked = new Marked({
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const RULES = {
  ALLOWED_TAGS: "a p br hr em strong del code pre blockquote ul ol li h1 h2 h3 h4 h5 h6 table thead tbody tr th td".split(" "),
  ALLOWED_ATTR: ["href", "title", "start", "align"],
  ADD_URI_SAFE_ATTR: ["start", "align"],
  ALLOWED_URI_REGEXP: /^(https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

export function rendered(text) {
  const found = window.DOMPurify.sanitize(marked.parse(text), RULES);
  for (const link of found.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer" });
  for (const block of found.querySelectorAll("pre")) block.append(copyButton(block.textContent));
  return found;
}

function copyButton(text) {
  const button = Object.assign(document.createElement("button"), { className: "copy small", textContent: "Copy" });
  button.addEventListener("click", async () => { button.textContent = await copy(text); });
  return button;
}

// Copies a text, and says how that went. A page over plain HTTP has no clipboard, and copies what is selected.
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => "Copied", () => "Not allowed");
  const area = Object.assign(document.createElement("textarea"), { value: text });
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done ? "Copied" : "Not allowed";
}
