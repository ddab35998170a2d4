"use strict";
(() => {
  const books = JSON.parse(document.getElementById("browser-data").textContent);
  const pick = document.getElementById("pick");
  const state = document.getElementById("state");
  const search = document.getElementById("search");
  const list = document.getElementById("samples");
  const count = document.getElementById("count");
  const back = document.getElementById("back");
  const next = document.getElementById("next");
  const PER_PAGE = 5;
  let page = 0;

  // Everything shown comes from models and data files, so it only ever enters the page as text.
  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };

  const entry = (list, term, content) => {
    if (!content || (Array.isArray(content) && !content.length)) return;
    list.append(make("dt", term));
    const node = make("dd");
    if (Array.isArray(content)) {
      const items = make("ul");
      content.forEach((text) => items.append(make("li", text)));
      node.append(items);
    } else node.textContent = content;
    list.append(node);
  };

  const card = (sample) => {
    const node = make("article", undefined, "card sample");
    node.append(make("h4", sample.task ? `${sample.id} · ${sample.task}` : sample.id));
    const facts = make("dl");
    const who = sample.description && sample.description !== sample.persona ? `${sample.persona}: ${sample.description}` : sample.persona;
    entry(facts, "persona", who);
    const more = sample.n_items - sample.items.length;
    entry(facts, sample.n_items === 1 ? "1 item" : `${sample.n_items} items`, more > 0 ? [...sample.items, `… and ${more} more`] : sample.items);
    sample.messages.forEach((message) => entry(facts, message.role, message.content));
    entry(facts, "options", sample.options);
    entry(facts, "target", sample.target);
    node.append(facts);
    const scroll = make("div", undefined, "scroll");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", `replies to ${sample.id}`);
    const table = make("table");
    const head = make("tr");
    ["stack", "reply", "values"].forEach((name) => {
      const cell = make("th", name);
      cell.scope = "col";
      head.append(cell);
    });
    table.append(make("thead"), make("tbody"));
    table.tHead.append(head);
    sample.replies.forEach((reply) => {
      const row = make("tr");
      const stack = make("th", reply.stack);
      stack.scope = "row";
      const values = make("td", undefined, "scores");
      if (reply.reason) values.append(make("span", `unscored: ${reply.reason}`, "down"));
      Object.entries(reply.values).forEach(([name, value]) => values.append(make("span", `${name} ${value}`), " "));
      row.append(stack, make("td", reply.raw, "reply"), values);
      table.tBodies[0].append(row);
    });
    scroll.append(table);
    node.append(scroll);
    return node;
  };

  const differ = (sample) => new Set(sample.replies.map((reply) => JSON.stringify([reply.values, reply.reason]))).size > 1;
  const wanted = {
    all: () => true,
    differ,
    unscored: (sample) => sample.replies.some((reply) => reply.reason),
  };

  const show = () => {
    const book = books[pick.value];
    const words = search.value.trim().toLowerCase();
    const found = book.samples.filter(
      (sample) => wanted[state.value](sample) && (!words || JSON.stringify(sample).toLowerCase().includes(words)),
    );
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    list.replaceChildren(...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(card));
    count.textContent = found.length
      ? `${found.length} of ${book.samples.length} samples, page ${page + 1} of ${pages}`
      : "no sample fits";
    back.disabled = page === 0;
    next.disabled = page === pages - 1;
  };

  document.querySelectorAll(".toggle").forEach((button) => button.addEventListener("click", () => {
    const off = button.getAttribute("aria-pressed") === "true";
    button.setAttribute("aria-pressed", String(!off));
    button.closest(".history").querySelectorAll(`g[data-series="${button.dataset.series}"]`)
      .forEach((group) => group.classList.toggle("off", off));
  }));

  books.forEach((book, i) => {
    const option = make("option", book.benchmark);
    option.value = i;
    pick.append(option);
  });
  [pick, state, search].forEach((control) => control.addEventListener("input", () => { page = 0; show(); }));
  back.addEventListener("click", () => { page -= 1; show(); });
  next.addEventListener("click", () => { page += 1; show(); });
  show();
})();
