const list = document.getElementById("cards");
const order = document.getElementById("order");
const only = document.getElementById("only");
const number = (card, name) => card.dataset[name] === "" ? -Infinity : Number(card.dataset[name]);
const orders = {
  gain: (a, b) => number(a, "gain") - number(b, "gain"),
  error: (a, b) => number(b, "error") - number(a, "error"),
  file: (a, b) => number(a, "index") - number(b, "index"),
};
function arrange() {
  [...list.children].sort(orders[order.value]).forEach((card) => {
    card.hidden = only.checked && card.dataset.failed !== "true";
    list.appendChild(card);
  });
  document.getElementById("none").hidden = [...list.children].some((card) => !card.hidden);
}
function unfold() {
  const card = location.hash.startsWith("#photo-") && document.getElementById(location.hash.slice(1));
  if (card) { card.open = true; card.scrollIntoView(); }
}
order.addEventListener("change", arrange);
only.addEventListener("change", arrange);
addEventListener("hashchange", unfold);
addEventListener("beforeprint", () => document.querySelectorAll("details.fold").forEach((fold) => { fold.open = true; }));
document.getElementById("controls").hidden = false;
unfold();
