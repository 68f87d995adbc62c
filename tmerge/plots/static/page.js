// A page of figures: the pictures of its book, each drawn in its place, in the light that the reader's machine asks for.
window.tmergePage = () => {
  const book = JSON.parse(document.getElementById("book").textContent), figures = {};
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const draw = (id, picture) => {
    figures[id] ||= tmergeFigure(document.getElementById(`${id}-figure`), book.templates);
    figures[id].show({ ...picture, file: `tmerge-${id}` });
  };
  const follow = () => document.body.classList.toggle("dark", dark.matches);
  dark.addEventListener("change", follow);
  follow();
  for (const [id, picture] of Object.entries(book.pictures)) draw(id, picture);
  return { book, draw };
};
